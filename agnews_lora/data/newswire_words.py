"""Vocabularies of the newswire corpus: one list a slot of the grammar, every entry drawn with equal probability.

A flat draw from long lists keeps the tail of each topic in play: a few thousand rows do not show all of it, while a
language model has met it before. Entries may hold slots themselves. Persons, companies and clubs are put together from
parts, so that no real one is said to have done anything.
"""

from typing import Final


def _entries(text: str) -> tuple[str, ...]:
    return tuple(" ".join(entry.split()) for entry in text.split(","))


_NEUTRAL: Final = {
    "first": """
        Alan, Amara, Ana, Anders, Andrei, Anita, Arjun, Astrid, Beatriz, Ben, Bianca, Boris, Carla, Carlos, Catherine,
        Chen, Chiara, Claire, Daniel, Daria, David, Diego, Dimitri, Elena, Elif, Emeka, Emma, Erik, Esther, Fatima,
        Felix, Fiona, Francesca, Gabriel, George, Giulia, Grace, Hana, Hans, Hassan, Helen, Hiroshi, Ibrahim, Ines,
        Ingrid, Isabel, Ivan, James, Jana, Javier, Jin, Joanna, Jorge, Jun, Karim, Katarina, Keiko, Kenneth, Kofi,
        Lars, Laura, Leila, Li, Linda, Lucia, Luis, Magnus, Manuel, Marco, Maria, Martin, Maya, Mehmet, Michael, Mina,
        Miriam, Nadia, Naomi, Nikolai, Nina, Noor, Oleg, Olga, Omar, Oscar, Pablo, Patrick, Paula, Pedro, Peter, Priya,
        Rafael, Rahul, Rebecca, Richard, Rita, Robert, Rosa, Ruth, Samir, Sanjay, Sara, Sergei, Simon, Sofia, Stefan,
        Susan, Svetlana, Takeshi, Tariq, Teresa, Thomas, Tomas, Ursula, Valentina, Vera, Victor, Walter, Wei, William,
        Yusuf, Yuki, Zara""",
    "surname": """
        Abbott, Achterberg, Adeyemi, Aldana, Almeida, Andersson, Arslan, Ashworth, Aydin, Bakker, Banerjee, Barrow,
        Bautista, Becker, Bergstrom, Bhatt, Blackwood, Bonnet, Borges, Brandt, Calloway, Campos, Cardoso, Carver,
        Castellan, Chaudhry, Cisneros, Coleman, Conti, Corrigan, Dalgaard, Danso, Delacroix, Desai, Diallo, Dombrowski,
        Donnelly, Dragan, Drummond, Duarte, Eastwood, Ekström, Eriksen, Escobedo, Fairfax, Falk, Farouk, Fernandes,
        Ferrante, Fitzgerald, Fontaine, Forsyth, Fukuda, Galvan, Garrison, Georgiou, Gilmore, Goswami, Greaves,
        Grimaldi, Gutierrez, Haas, Haddad, Halden, Hargreaves, Hartmann, Hashimoto, Hollis, Horvath, Hutchins, Ibarra,
        Ignatiev, Ilves, Ishikawa, Ivanova, Jablonski, Jansen, Jimenez, Joubert, Kamau, Kapoor, Karlsson, Keane,
        Kessler, Khalil, Kimura, Kipkemboi, Kowalczyk, Kuznetsov, Lacroix, Lambert, Larkin, Laskaris, Lindqvist,
        Lombardi, Lowell, Lysenko, Macaulay, Mahmoud, Malhotra, Marchetti, Marlow, Mbeki, McAllister, Medina, Mendoza,
        Mikkelsen, Molina, Moreau, Mwangi, Nakagawa, Navarro, Nel, Nkrumah, Norcross, Novak, Nyberg, Obi, Ogawa, Okafor,
        Olivares, Orlov, Ortega, Osborne, Ozturk, Papadakis, Paredes, Pavlov, Pemberton, Petrov, Pham, Pinto, Quigley,
        Quintero, Rahman, Ramsey, Rasmussen, Reyes, Ridley, Rosario, Rossi, Sadiq, Salazar, Sandoval, Santoro, Sato,
        Schaefer, Sharma, Sinclair, Sokolov, Soto, Stavros, Stoltz, Sundaram, Szabo, Takahashi, Tanaka, Tavares,
        Thackeray, Thorne, Tkachenko, Torres, Tran, Uchida, Underhill, Urquhart, Valdez, Vargas, Vasquez, Verhoeven,
        Villanueva, Volkov, Wainwright, Wakefield, Weber, Whitlock, Winslow, Yamada, Yilmaz, Zapata, Zeller, Zhang""",
    "person": "{first} {surname}",
    "city": """
        Abuja, Accra, Adelaide, Aleppo, Algiers, Almaty, Amman, Amsterdam, Ankara, Antwerp, Athens, Atlanta, Auckland,
        Baku, Baltimore, Bangalore, Bangkok, Barcelona, Basel, Beirut, Belfast, Belgrade, Berlin, Bilbao, Birmingham,
        Bogota, Bologna, Bordeaux, Boston, Bratislava, Brisbane, Bristol, Brussels, Bucharest, Budapest, Buenos Aires,
        Buffalo, Cairo, Calgary, Cape Town, Caracas, Cardiff, Casablanca, Charlotte, Chennai, Chicago, Cleveland,
        Cologne, Colombo, Copenhagen, Dakar, Dallas, Damascus, Delhi, Denver, Detroit, Dhaka, Doha, Dresden, Dubai,
        Dublin, Durban, Edinburgh, Edmonton, Florence, Frankfurt, Geneva, Glasgow, Gothenburg, Guadalajara, Halifax,
        Hamburg, Hanoi, Harare, Havana, Helsinki, Hong Kong, Houston, Hyderabad, Islamabad, Istanbul, Jakarta,
        Jerusalem, Johannesburg, Kampala, Karachi, Kathmandu, Kiev, Kinshasa, Krakow, Kuala Lumpur, Kyoto, La Paz,
        Lagos, Lahore, Leeds, Leipzig, Lima, Lisbon, Liverpool, London, Los Angeles, Luanda, Lusaka, Lyon, Madrid,
        Manchester, Manila, Marseille, Medellin, Melbourne, Memphis, Mexico City, Miami, Milan, Milwaukee, Minsk,
        Monterrey, Montevideo, Montreal, Moscow, Mumbai, Munich, Nagoya, Nairobi, Naples, Nashville, Newcastle, Nice,
        Nicosia, Osaka, Oslo, Ottawa, Paris, Perth, Philadelphia, Phoenix, Pittsburgh, Porto, Prague, Pretoria, Quebec,
        Quito, Rabat, Riga, Riyadh, Rome, Rotterdam, Salzburg, San Diego, Santiago, Sao Paulo, Sapporo, Sarajevo,
        Seattle, Seoul, Seville, Shanghai, Sheffield, Singapore, Skopje, Sofia, Stockholm, Stuttgart, Sydney, Taipei,
        Tallinn, Tampa, Tashkent, Tbilisi, Tehran, Tokyo, Toronto, Toulouse, Tripoli, Tunis, Turin, Valencia, Vancouver,
        Venice, Vienna, Vilnius, Warsaw, Wellington, Winnipeg, Yerevan, Zagreb, Zurich""",
    "nation": """
        Afghanistan, Albania, Algeria, Angola, Argentina, Armenia, Australia, Austria, Azerbaijan, Bangladesh, Belarus,
        Belgium, Bolivia, Bosnia, Botswana, Brazil, Bulgaria, Burundi, Cambodia, Cameroon, Canada, Chad, Chile, China,
        Colombia, Congo, Croatia, Cuba, Cyprus, Denmark, Ecuador, Egypt, El Salvador, Eritrea, Estonia, Ethiopia,
        Fiji, Finland, France, Gabon, Georgia, Germany, Ghana, Greece, Guatemala, Guinea, Haiti, Honduras, Hungary,
        Iceland, India, Indonesia, Iran, Iraq, Ireland, Israel, Italy, Ivory Coast, Jamaica, Japan, Jordan, Kazakhstan,
        Kenya, Kuwait, Kyrgyzstan, Laos, Latvia, Lebanon, Liberia, Libya, Lithuania, Macedonia, Madagascar, Malawi,
        Malaysia, Mali, Mexico, Moldova, Mongolia, Morocco, Mozambique, Myanmar, Namibia, Nepal, New Zealand, Nicaragua,
        Niger, Nigeria, Norway, Oman, Pakistan, Panama, Paraguay, Peru, Poland, Portugal, Qatar, Romania, Russia,
        Rwanda, Saudi Arabia, Senegal, Serbia, Sierra Leone, Slovakia, Slovenia, Somalia, South Africa, South Korea,
        Spain, Sri Lanka, Sudan, Sweden, Switzerland, Syria, Taiwan, Tajikistan, Tanzania, Thailand, Togo, Tunisia,
        Turkey, Uganda, Ukraine, Uruguay, Uzbekistan, Venezuela, Vietnam, Yemen, Zambia, Zimbabwe""",
    "national": """
        Afghan, Albanian, Algerian, American, Angolan, Argentine, Armenian, Australian, Austrian, Bangladeshi,
        Belarusian, Belgian, Bolivian, Bosnian, Brazilian, British, Bulgarian, Cambodian, Canadian, Chadian, Chilean,
        Chinese, Colombian, Congolese, Croatian, Cuban, Czech, Danish, Dutch, Ecuadorean, Egyptian, Estonian, Ethiopian,
        Finnish, French, Georgian, German, Ghanaian, Greek, Guatemalan, Haitian, Hungarian, Icelandic, Indian,
        Indonesian, Iranian, Iraqi, Irish, Israeli, Italian, Jamaican, Japanese, Jordanian, Kazakh, Kenyan, Kuwaiti,
        Latvian, Lebanese, Liberian, Libyan, Lithuanian, Malaysian, Mexican, Mongolian, Moroccan, Namibian, Nepalese,
        Nigerian, Norwegian, Pakistani, Panamanian, Peruvian, Polish, Portuguese, Qatari, Romanian, Russian, Rwandan,
        Saudi, Scottish, Senegalese, Serbian, Slovak, Slovenian, Somali, South African, South Korean, Spanish,
        Sri Lankan, Sudanese, Swedish, Swiss, Syrian, Taiwanese, Tanzanian, Thai, Tunisian, Turkish, Ugandan, Ukrainian,
        Uruguayan, Venezuelan, Vietnamese, Welsh, Yemeni, Zambian, Zimbabwean""",
    "day": "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    "period": "days, weeks, months, a year, two years, three years, half a decade, a decade, two decades",
    "ordinal": "second, third, fourth, fifth, sixth, seventh, eighth, ninth, tenth",
    "few": "two, three, four, five, six, seven, eight, nine, ten, 11, 12, 13, 14, 15, 16, 18, 20, 24",
    "many": "more than 30, some 40, at least 50, about 60, nearly 80, more than 100, some 120, about 300",
    "percent": "3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14, 16, 17, 19, 21, 23, 26, 28, 31, 34, 37, 42",
    "millions": "40, 65, 90, 120, 150, 180, 230, 260, 310, 350, 420, 480, 540, 610, 750, 820, 930",
}

_WORLD: Final = {
    "leader": """
        president, prime minister, foreign minister, interior minister, defence minister, justice minister, chancellor,
        king, crown prince, emir, army chief, opposition leader, ambassador, envoy, governor, attorney general,
        archbishop, grand mufti, ombudsman, police chief, vice president, speaker of parliament, senator, patriarch,
        deputy premier, chief justice, consul, head of state, junta leader, general, minister of health, cardinal""",
    "group": """
        rebels, Maoist guerrillas, separatists, militiamen, insurgents, tribal fighters, warlords, jihadists,
        paramilitaries, mutinous soldiers, gunmen, pirates, smugglers, kidnappers, drug cartels, settlers, protesters,
        monks, clerics, nationalists, royalists, exiles, dissidents, secessionists, vigilantes, armed nomads, hardliners,
        human traffickers, coup plotters, army deserters, Islamist militants, Marxist fighters, cattle raiders, bandits,
        suicide bombers, hijackers, reservists, border guards, riot police, commandos, loyalists, extremists,
        mercenaries, strongmen, anarchists, Tamil Tigers, Kurdish fighters, Basque separatists, Taliban fighters,
        Chechen rebels, Shiite militiamen, Sunni insurgents, Zapatista rebels, Hutu militiamen, peasant leagues""",
    "victims": """
        villagers, pilgrims, aid workers, peacekeepers, refugees, migrants, hostages, schoolgirls, worshippers,
        journalists, diplomats, election monitors, missionaries, orphans, asylum seekers, peasants, prisoners, mourners,
        bus passengers, army recruits, tribesmen, shoppers, stranded tourists, displaced families, conscripts, nuns,
        market traders, wedding guests, human rights activists, fishermen, soldiers, policemen, civilians, detainees,
        political prisoners, nomads, castaways, stowaways, nurses, shepherds, commuters, magistrates, farm labourers""",
    "attack": """
        car bomb, mortar attack, ambush, suicide bombing, grenade attack, drive-by shooting, rocket barrage, land mine
        blast, air strike, arson attack, night raid, sniper fire, naval blockade, massacre, border clash, prison riot,
        roadside bomb, stampede, assassination attempt, hostage-taking, artillery barrage, shoot-out, parcel
        bomb, poisoning, ethnic cleansing campaign, machete attack, helicopter attack, mob attack""",
    "disaster": """
        earthquake, flood, landslide, typhoon, cyclone, drought, famine, ferry sinking, train crash, mine collapse,
        plane crash, mudslide, tsunami, wildfire, heat wave, dam burst, cholera outbreak, bridge collapse, avalanche,
        locust plague, volcanic eruption, hotel fire, bus plunge, factory fire, sandstorm, blizzard, gas explosion,
        tropical storm, measles epidemic, shipwreck, tenement collapse, monsoon deluge""",
    "accord": """
        peace accord, ceasefire, border treaty, prisoner swap, disarmament pact, truce, power-sharing deal, extradition
        treaty, non-aggression pact, nuclear inspection agreement, war crimes tribunal, amnesty, land-mine ban,
        water-sharing treaty, refugee return plan, buffer zone, arms embargo, no-fly zone, demilitarised zone, roadmap to
        peace, fishing-zone accord, visa-free regime, reconciliation pact, transitional charter, reburial pact,
        maritime boundary, safe-passage deal, hostage release, exchange of ambassadors, repatriation pact""",
    "body": """
        parliament, constitutional court, ruling party, Security Council, African Union, European Commission, Arab
        League, electoral commission, upper house, military junta, truth commission, interim government, national
        assembly, Red Cross, supreme court, coalition cabinet, royal palace, Commonwealth secretariat, NATO
        command, foreign ministry, refugee agency, Amnesty International, war crimes court, council of elders, Politburo,
        provincial legislature, high court, interior ministry, opposition alliance, peacekeeping mission, gendarmerie,
        federal senate, constituent assembly, OSCE mission, the Hague tribunal, coast guard, secret police, loya jirga,
        regional governors, state prosecutors, caretaker government, army high command""",
    "grievance": """
        land seizures, ballot rigging, emergency rule, police brutality, conscription, the headscarf ban, caste quotas,
        blasphemy laws, the death penalty, censorship, torture in prisons, child soldiers, a disputed border, the burial
        of a dictator, minority languages, sharia law, abortion, gay marriage, gun laws, corruption, royal succession,
        disappearances, mass graves, deportations, checkpoints, martial law, the return of exiles, genocide denial,
        honour killings, dowry deaths, indigenous rights, polygamy, colonial atrocities, foreign troops, hunger,
        forced evictions, curfews, statelessness, wartime reparations, slum clearances, sectarian killings""",
    "charge": """
        treason, war crimes, sedition, genocide, espionage, vote buying, murder, abduction, crimes against humanity,
        arms smuggling, blasphemy, torture, plotting a coup, inciting riots, desertion, people trafficking, apostasy,
        perjury, looting relics, libelling the king, harbouring terrorists, child slavery, election fraud""",
}

_SPORTS: Final = {
    "club_name": """
        Rovers, Wanderers, Tigers, Lions, Hawks, Bears, Sharks, Giants, Raiders, Bulldogs, Falcons, Knights, Panthers,
        Athletic, Dynamos, Rangers, Harlequins, Saints, Wasps, Pirates, Warriors, Cougars, Mustangs, Stallions, Rockets,
        Comets, Hornets, Buccaneers, Crusaders, Chiefs, Cavaliers, Red Sox, White Caps, Blue Jays, Celtics, Hotspur,
        Albion, City, United, Town, Villa, County, Corinthians, Olympique, Racing, Sporting, Lokomotiv, Spartak, Torpedo,
        Eagles, Wolves, Bruins, Penguins, Canucks, Senators, Bobcats, Gladiators, Vikings, Spartans, Trojans, Broncos,
        Stingers, Kestrels, Magpies, Swans, Kangaroos, Roosters, Rhinos, Cardinals, Orioles, Marlins, Mariners""",
    "club": "{city} {club_name}",
    "athlete": """
        striker, goalkeeper, midfielder, shortstop, pitcher, catcher, outfielder, quarterback, linebacker, tailback,
        point guard, power forward, fly-half, prop forward, scrum-half, hooker, fast bowler, opening batsman, leg
        spinner, wicketkeeper, sprinter, hurdler, marathon runner, pole vaulter, shot putter, javelin thrower, decathlete,
        high jumper, butterfly swimmer, backstroker, diver, gymnast, figure skater, speed skater, slalom skier, downhill
        racer, snowboarder, ski jumper, biathlete, luger, bobsledder, goaltender, defenceman, cyclist, triathlete, rower,
        sculler, yachtsman, surfer, jockey, show jumper, dressage rider, golfer, tennis ace, badminton star, squash
        player, table tennis player, heavyweight, flyweight boxer, wrestler, judoka, fencer, archer, weightlifter, sumo
        wrestler, rally driver, grand prix driver, motocross rider, chess grandmaster, darts player, snooker player,
        curler, handball captain, volleyball setter, water polo captain, netball defender, lacrosse midfielder, hurler,
        race walker, steeplechaser, left-back, winger, centre half, wide receiver, hammer thrower, kickboxer""",
    "event": """
        Ryder Cup, Tour de France, Davis Cup, FA Cup, Champions League, Super Bowl, World Series, Stanley Cup, Masters,
        Wimbledon, French Open, U.S. Open, Ashes, Six Nations, Rugby World Cup, Grand National, Kentucky Derby, Indy 500,
        Monaco Grand Prix, Boston Marathon, Commonwealth Games, Winter Olympics, Asian Games, Pan American Games, Giro
        d'Italia, America's Cup, Copa America, Africa Cup of Nations, Gold Cup, Solheim Cup, Fed Cup, Heisman Trophy,
        Rose Bowl, NBA finals, March Madness, World Cup qualifiers, Tri-Nations, Heineken Cup, Melbourne Cup, Uefa Cup,
        Bundesliga, Serie A, Primera Liga, Premiership, Daytona 500, Paralympics, Boat Race, Grey Cup, Thomas Cup, Diamond
        League, Paris-Roubaix, Vuelta, Dakar Rally, Le Mans 24 Hours, Rugby Sevens, Test series, one-day international,
        Bledisloe Cup, Carling Cup, PGA Championship, Isle of Man TT, European Cup, Orange Bowl, welterweight title bout,
        world indoor championships, four-man bobsleigh, Nordic combined, synchronised diving final, 4x100 metres relay,
        playoffs, wild-card race, quarter-finals, all-star game, regatta, steeplechase, super-G, giant slalom, epee final,
        keirin, omnium, modern pentathlon, pommel horse final, clean and jerk, uneven bars final, coxless fours""",
    "feat": """
        a hat-trick, a no-hitter, a grand slam, a hole in one, an own goal, three touchdowns, a double century, a
        triple-double, a penalty save, a walk-off home run, a buzzer-beating three-pointer, a last-gasp try, five wickets, a
        diving catch, a bicycle kick, a bogey-free 64, a knockout punch, a photo finish, a backhand winner, 18 aces, a
        drop goal, a free kick from 30 yards, two red cards, a sudden-death putt, an eagle on the 17th, a breakaway
        goal, a shutout, a fumble, an interception, a stolen base, a slam dunk, a perfect vault, a triple axel, a false
        start, a bull's-eye, an ippon throw, a checkered flag, a pit-stop gamble, a yellow jersey, a bunker shot, a
        tie-break, a header from a corner, a 147 break, a field goal as time expired, a botched relay handover, a mazy
        dribble, an overtime winner, a maiden over, a power-play goal, 30 rebounds, a clean sheet, a spot kick, a
        nine-dart finish, a line-out steal, a sprint to the line, a missed short putt, a body slam, a rally from two
        sets down, a solo breakaway in the mountains, a scrambling volley, a stumping, an uppercut""",
    "injury": """
        hamstring strain, torn cruciate ligament, broken collarbone, groin injury, concussion, stress fracture, sprained
        ankle, sore rotator cuff, calf strain, broken metatarsal, dislocated shoulder, tennis elbow, bruised ribs, torn
        meniscus, pulled quadriceps, herniated disc, broken jaw, Achilles tendon tear, wrist tendinitis, black eye""",
    "offence": """
        a failed doping test, a two-footed tackle, spitting at a referee, match-fixing, an illegal bat, biting an
        opponent, steroid use, a touchline brawl, a head-butt, ball tampering, a missed drug test, diving in the box,
        a dangerous swerve, a high-sticking penalty, throwing a racket, an underweight boat, blood doping, a late hit""",
    "coach": """
        manager, head coach, captain, goalkeeping coach, trainer, player-coach, team principal, skipper, team doctor,
        bullpen coach, offensive coordinator, chief selector, caddie, cornerman, sporting director, swimming coach""",
    "ground": """
        stadium, velodrome, ice rink, racecourse, clay court, ballpark, links course, boxing ring, rowing lake, ski jump,
        swimming pool, running track, cricket ground, race circuit, gymnasium, bowling green, halfpipe, dojo, dugout""",
}

_BUSINESS: Final = {
    "trade": """
        Airlines, Cement, Breweries, Steel, Insurance, Bancorp, Petroleum, Shipping, Foods, Textiles, Motors, Mining,
        Pharmaceuticals, Railways, Retail, Hotels, Paper, Chemicals, Aluminium, Tobacco, Dairy, Cosmetics, Toys,
        Furniture, Logistics, Realty, Securities, Savings Bank, Telecom, Broadcasting, Publishing, Utilities, Power,
        Fertilisers, Confectionery, Distillers, Apparel, Footwear, Jewellers, Supermarkets, Department Stores, Mortgage,
        Leasing, Tyres, Plastics, Glass, Shipyards, Aerospace, Packaging, Timber, Sugar, Coffee Roasters, Vineyards,
        Poultry, Meat Packers, Grain, Rubber, Copper, Zinc, Diamonds, Oil Sands, Refining, Pipelines, Coal, Gas, Casinos,
        Cruise Lines, Car Rental, Trucking, Couriers, Staffing, Advertising, Consulting, Brokers, Asset Management,
        Hedge Fund, Reinsurance, Homebuilders, Elevators, Appliances, Watches, Eyewear, Stationery, Carpets, Ceramics,
        Machine Tools, Turbines, Bearings, Cables, Paints, Detergents, Pet Foods, Bottlers, Bakeries, Fisheries, Holdings,
        Capital, Partners, Industries, Group, Trust, Drugstores, Catering, Duty Free, Freight, Warehouses, Nurseries""",
    "company": "{surname} {trade}, {surname} {trade}, {surname} & {surname2}, {city} {trade}, {surname}-{surname2} {trade}",
    "goods": """
        crude oil, heating oil, natural gas, jet fuel, copper, gold, platinum, cocoa, coffee, soybeans, wheat, sugar,
        cotton, wool, timber, rubber, iron ore, steel rebar, newsprint, fertiliser, orange juice, pork bellies, milk
        powder, sport-utility vehicles, pickup trucks, sneakers, jeans, handbags, perfume, lipstick, sofas, carpets,
        refrigerators, washing machines, mattresses, wristwatches, diamonds, bottled water, lager, whisky, champagne,
        cigarettes, frozen pizza, breakfast cereal, chocolate bars, potato chips, baby formula, pet food, office chairs,
        lawn mowers, garden tools, tyres, spark plugs, container ships, regional jets, freight wagons, forklift trucks,
        elevators, cement, bricks, wallpaper, greeting cards, paperbacks, magazines, toys, bicycles, prams, generic
        drugs, painkillers, contact lenses, hearing aids, package holidays, cruises, hotel rooms, airline tickets,
        mobile phone contracts, cable subscriptions, life insurance, car loans, credit cards, home mortgages, office
        space, luxury flats, warehouse space, palm oil, farmed salmon, frozen chicken, cut flowers, tinned tuna, linen""",
    "executive": """
        chief executive, finance director, chairman, treasurer, hedge fund manager, investment banker, auditor,
        shareholder, bond trader, venture capitalist, economist, accountant, marketing director, bankruptcy trustee,
        stockbroker, union negotiator, property tycoon, retail analyst, central banker, commodities dealer, bookkeeper,
        management consultant, pension fund trustee, insurance underwriter, currency strategist, department store owner,
        merchandiser, purchasing manager, franchise owner, loan officer, tax adviser, billionaire investor, creditor""",
    "deal": """
        takeover bid, merger, management buyout, share buyback, rights issue, initial public offering, bond sale, joint
        venture, stake sale, spin-off, debt restructuring, leveraged buyout, franchise agreement, refinancing, hostile
        bid, asset sale, poison pill, demerger, liquidation, bankruptcy filing, credit line, licensing deal, cash call,
        private placement, supply contract, real estate sale, outsourcing contract, tender offer, profit-sharing deal,
        stock split, secondary listing, securitisation, sale and leaseback, pension fund transfer, special dividend""",
    "indicator": """
        consumer prices, factory orders, retail sales, jobless claims, housing starts, industrial output, payrolls,
        wholesale inflation, the trade deficit, mortgage rates, business confidence, durable goods orders, bank lending,
        the current account, household debt, capital spending, consumer confidence, export orders, producer prices,
        labour costs, bond yields, car registrations, the budget surplus, money supply, bankruptcies, inventories,
        office vacancies, new home sales, service sector growth, personal incomes, crude stockpiles, vacancy rates""",
    "asset": """
        the dollar, the euro, the yen, sterling, the Swiss franc, Treasury bonds, bank stocks, oil futures, gold bullion,
        airline shares, blue chips, junk bonds, the peso, the rupee, chip stocks, mining shares, retail stocks, copper
        futures, the Nikkei, the Dow, the FTSE, the Dax, small caps, insurance shares, utilities stocks, wheat futures,
        drug stocks, corporate bonds, the rand, the real, tech shares, coffee futures, mortgage bonds, media shares""",
    "watchdog": """
        securities regulator, central bank, antitrust authority, stock exchange, competition commission, bankruptcy
        court, tax office, takeover panel, insurance supervisor, World Trade Organisation, International Monetary Fund,
        finance ministry, customs office, audit board, treasury, labour board, trade commission, pension regulator""",
    "misdeed": """
        price fixing, accounting fraud, insider trading, overstated earnings, tax evasion, unpaid overtime, bid rigging,
        mis-selling pensions, dumping, hidden fees, late filings, inflated reserves, kickbacks, misleading brochures,
        predatory lending, false invoices, market manipulation, money laundering, backdated options, channel stuffing""",
    "shake_up": """
        job cuts, plant closures, wage freeze, cost cuts, store openings, hiring freeze, shift to contract labour,
        dividend cut, price rise, profit warning, boardroom reshuffle, pay deal, brand revamp, new payment terms,
        early retirement scheme, store refit, discount campaign, write-down, factory expansion, route cuts""",
}

_SCIENCE: Final = {
    "scientist": """
        astronomers, palaeontologists, geneticists, neuroscientists, marine biologists, volcanologists, particle
        physicists, chemists, botanists, entomologists, ornithologists, virologists, immunologists, epidemiologists,
        oncologists, cardiologists, climatologists, oceanographers, glaciologists, seismologists, geologists,
        archaeologists, anthropologists, primatologists, zoologists, mycologists, microbiologists, biochemists,
        mathematicians, cryptographers, computer scientists, roboticists, materials scientists, nanotechnologists,
        astrophysicists, cosmologists, planetary scientists, ecologists, herpetologists, ichthyologists, physiologists,
        pharmacologists, embryologists, stem cell biologists, acousticians, optical engineers, rocket engineers,
        software engineers, chip designers, bioinformaticians, crystallographers, meteorologists, hydrologists,
        soil scientists, toxicologists, nutritionists, psychologists, linguists, taxonomists, radiologists""",
    "organism": """
        giant squid, fruit flies, zebrafish, humpback whales, mountain gorillas, honeybees, coral polyps, feathered
        dinosaur, mammoth, hominid, sabre-toothed cat, trilobite, coelacanth, leatherback turtles, monarch butterflies,
        bowhead whale, polar bears, emperor penguins, snow leopards, vampire bats, naked mole rats, lab mice, yeast
        cells, nematode worms, slime mould, tree frogs, box jellyfish, lungfish, horseshoe crabs, sea urchins,
        bottlenose dolphins, chimpanzees, macaques, lemurs, pterosaur, ichthyosaur, tyrannosaur, orchid, giant sequoias,
        pitcher plant, kelp, algae bloom, lichen, truffle fungus, soil bacteria, archaea, bacteriophage, salamander,
        platypus, echidna, Tasmanian devils, dung beetles, leafcutter ants, orb spiders, migrating cranes,
        hummingbirds, crows, parrots, Galapagos finches, dodo, thylacine, plankton, krill, tardigrades, cicadas""",
    "ailment": """
        malaria, tuberculosis, bird flu, Alzheimer's disease, Parkinson's disease, diabetes, breast cancer, leukaemia,
        cystic fibrosis, asthma, HIV, hepatitis C, multiple sclerosis, sickle cell anaemia, dengue fever, Ebola,
        macular degeneration, melanoma, epilepsy, schizophrenia, autism, osteoporosis, rheumatoid arthritis, mad cow
        disease, muscular dystrophy, Huntington's disease, gum disease, high cholesterol, prostate tumours, whooping
        cough, insomnia, migraine, obesity, hearing loss, stroke, lupus, sepsis, West Nile virus, allergies, psoriasis""",
    "gadget": """
        smartphone, laptop, MP3 player, digital camera, games console, plasma screen, e-book reader, webcam, pocket
        computer, wireless router, flash drive, DVD recorder, satellite navigation unit, hearing implant, robot vacuum
        cleaner, 3-D printer, fuel cell, lithium battery, solar panel, touch screen, microprocessor, graphics card,
        hard disk, headset, camera phone, set-top box, drone, wearable sensor, bionic arm, exoskeleton, memory chip,
        inkjet printer, barcode scanner, fingerprint reader, radio tag, optical mouse, tablet, supercomputer, server,
        video projector, voice recorder, smart card, pedometer, electron microscope, hologram display, e-paper display""",
    "software": """
        web browser, search engine, operating system, spam filter, instant messenger, spreadsheet, photo editor, music
        store, encryption tool, compiler, open-source database, media player, virus scanner, online game, blogging tool,
        voice-over-internet service, file-sharing network, e-mail program, speech recogniser, chess program, firewall,
        mapping service, translation engine, chat bot, word processor, video codec, Linux kernel, shooter game, wiki,
        peer-to-peer client, news reader, password manager, desktop search tool, web server, social network,
        handwriting recogniser, patch, plug-in, toolbar, screensaver, flight simulator, role-playing game, web forum""",
    "flaw": """
        worm, Trojan horse, phishing scam, buffer overflow, spyware, denial-of-service attack, security hole, rootkit,
        e-mail virus, data leak, keystroke logger, zombie network, cross-site scripting bug, memory leak, pop-up exploit,
        password flaw, adware, back door, spam wave, domain hijack, clock bug, macro virus, boot-sector virus""",
    "heavenly": """
        a comet, an asteroid, a black hole, a neutron star, a red dwarf, Saturn's rings, Titan, Europa, Martian soil, a lunar crater,
        a solar flare, a supernova, a gamma-ray burst, a quasar, dark matter, an exoplanet, a brown dwarf, Mercury, Jupiter's red
        spot, Venus, Pluto, the Milky Way, a meteorite, cosmic rays, gravitational waves, a pulsar, a nebula, a galaxy cluster,
        the Kuiper belt, Io's volcanoes, a dust storm on Mars, the solar wind, Halley's comet, a globular cluster, the aurora""",
    "craft": """
        space shuttle, orbiter, Mars rover, space telescope, weather satellite, space probe, lander, ion engine, Soyuz
        capsule, Ariane rocket, space station, booster rocket, radio telescope, solar sail, sounding rocket, spacesuit,
        communications satellite, reentry capsule, crew module, lunar lander, star tracker, infrared camera, robot arm,
        scramjet, sample-return capsule, heat shield, gyroscope, particle accelerator, neutrino detector, ice core drill,
        submersible, deep-sea robot, laser interferometer, fusion reactor, wind tunnel, ocean buoy, gene sequencer""",
    "matter": """
        carbon nanotubes, graphene, superconductors, quantum dots, buckyballs, liquid crystals, aerogel, antimatter,
        neutrinos, the Higgs boson, quarks, plasma, photonic crystals, ozone, methane hydrate, greenhouse gases,
        spider silk, stem cells, mitochondria, telomeres, prions, antibodies, enzymes, proteins, DNA strands, RNA, genes,
        chromosomes, neurons, synapses, insulin, dopamine, chlorophyll, permafrost, glaciers, magma, tectonic plates,
        sediment cores, amber, fossil eggs, stone tools, qubits, lasers, microwaves, radio waves, silicon wafers, alloys,
        polymers, catalysts, isotopes, peptides, retinal cells, gut bacteria, embryos, pollen, hormones, 
        sea ice, coral reefs, ocean currents, cloud droplets, hydrogen, biofuels, prime numbers, fractals, algorithms""",
    "lab": """
        space agency, observatory, natural history museum, medical school, botanical garden, marine station, jet
        propulsion laboratory, institute of technology, cancer centre, polar institute, genome centre, physics institute,
        university, computing laboratory, academy of sciences, synchrotron, seed bank, research hospital, zoo,
        aquarium, geological survey, weather bureau, vaccine institute, robotics workshop, open-source foundation""",
}

WORDS: Final[dict[str, tuple[str, ...]]] = {
    slot: _entries(text) for part in (_NEUTRAL, _WORLD, _SPORTS, _BUSINESS, _SCIENCE) for slot, text in part.items()
}
"""Slot name to its entries. A slot in a template is the name in braces; a digit after it asks for another draw."""
