"""Templates of the newswire corpus, by topic: what happens, how it is told, and what strays in from elsewhere.

A scene is one event in three forms that share their slots: `headline | clause | phrase`. The clause is a main clause
in the past tense, the phrase names the same event as a noun. Both also fit into the story of another topic, where they
are an aside; the headline never is. `{other}` is the phrase of a scene of another topic.
"""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True)
class Scene:
    """One event as a headline, as a main clause and as a noun phrase."""

    headline: str
    clause: str
    phrase: str


def _lines(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.strip().splitlines())


def _scenes(text: str) -> tuple[Scene, ...]:
    return tuple(Scene(*(part.strip() for part in line.split(" | "))) for line in _lines(text))


SCENES: Final = (
    # World
    _scenes("""
        {national} troops battle {group} near {city} | {national} troops fought {group} on the outskirts of {city}, leaving {few} dead | the battle between {national} troops and {group}
        {attack} kills {few} {victims} in {nation} | a {attack} killed {few} {victims} in the north of {nation} | the {attack} that killed {few} {victims}
        {nation}, {nation2} sign {accord} | {nation} and {nation2} signed a {accord} after talks in {city} | the {accord} between {nation} and {nation2}
        {disaster} claims lives of {few} {victims} | a {disaster} in {nation} took the lives of {few} {victims} | the {disaster} that hit {victims} in {nation}
        {national} {leader} quits over {grievance} | the {national} {leader} stepped down amid anger over {grievance} | the fall of the {national} {leader}
        {group} release {few} {victims} | {group} in {nation} released {few} {victims} after {period} in captivity | the release of {few} {victims} by {group}
        {body} to rule on {grievance} | the {body} in {city} agreed to rule on {grievance} | the ruling of the {body} on {grievance}
        thousands march over {grievance} | thousands marched through {city} to protest against {grievance} | the marches over {grievance} in {city}
        {person} takes {nation} vote | {person} was declared winner of the election in {nation} despite complaints about {grievance} | the election of {person} in {nation}
        ex-{leader} stands trial for {charge} | a former {leader} of {nation} went on trial in {city}, accused of {charge} | the trial of a former {leader} for {charge}
        {group} suspected as {attack} rocks {city} | a {attack} rocked {city} and the authorities blamed {group} | the {attack} blamed on {group}
        {victims} flee {nation} as {group} close in | {many} {victims} crossed the border out of {nation} to escape {group} | the flight of {victims} from {nation}
        {nation} expels {national} {leader} | {nation} ordered the {national} {leader} to leave within days over claims of {charge} | the expulsion of a {national} {leader} from {nation}
        {leader} in {city} to save {accord} | a {national} {leader} flew to {city} in an effort to rescue the {accord} | the mission to rescue the {accord}
        {nation} mourns {victims} | {nation} declared a day of mourning for {few} {victims} who died in a {disaster} | the mourning for {few} {victims} in {nation}
        {group} reject {accord} | {group} rejected a {accord} offered by the {body} | the rejection of the {accord} by {group}
        {leader} suspended by {body} | the {body} suspended the {national} {leader} on suspicion of {charge} | the suspension of the {national} {leader}
        {nation} seals border after {attack} | {nation} sealed its border with {nation2} after a {attack} | the closing of the border between {nation} and {nation2}
        relief reaches {victims} after {disaster} | relief convoys reached {victims} in {nation} cut off by a {disaster} | the relief effort for {victims} in {nation}
        {national} {leader} survives {attack} | the {national} {leader} escaped unhurt from a {attack} in {city} | the {attack} aimed at the {national} {leader}
        {few} {group} jailed for {charge} | a court in {city} jailed {few} {group} for {charge} | the jailing of {few} {group} in {city}
        {nation} to send troops against {group} | {nation} offered troops to help {nation2} drive back {group} | the offer of troops against {group}
        tents needed after {disaster} | the {body} asked for tents and food for {victims} after the {disaster} in {nation} | the appeal for {victims} of the {disaster}
        {nation} recalls {leader} from {city} | {nation} recalled its {leader} from {city} in a quarrel over {grievance} | the quarrel between {nation} and {nation2} over {grievance}
        {leader} pardons {group} | the {national} {leader} pardoned {few} {group} convicted of {charge} | the pardon for {group} convicted of {charge}
        vote on {grievance} splits {nation} | voters in {nation} went to the polls in a referendum on {grievance} | the referendum on {grievance} in {nation}
        {group} storm {body} | {group} stormed the offices of the {body} in {city} and seized {few} {victims} | the storming of the {body} by {group}
        {nation} looks for survivors of {disaster} | rescuers in {nation} searched for {victims} missing since a {disaster} | the search for {victims} in {nation}
    """),
    # Sports
    _scenes("""
        {club} down {club2} in {event} | {club} beat {club2} in the {event} thanks to {feat} by {person} | the win of {club} over {club2}
        {person} out with {injury} | {athlete} {person} was ruled out of the {event} with a {injury} | the {injury} suffered by {athlete} {person}
        {club} sign {athlete} | {club} signed {national} {athlete} {person} from {club2} | the move of {athlete} {person} to {club}
        {national} {athlete} takes {event} | {national} {athlete} {person} won the {event} in {city} | the {event} triumph of {athlete} {person}
        {person} banned for {offence} | {athlete} {person} was banned for {few} matches for {offence} | the ban on {person} for {offence}
        {club} sack {coach} | {club} sacked their {coach} after a {ordinal} straight defeat | the sacking of the {coach} at {club}
        {club} roar back with {feat} | {feat} from {person} lifted {club} to a comeback over {club2} | the comeback of {club} against {club2}
        {nation} reach {event} | {nation} edged {nation2} to qualify for the {event}, with {person} producing {feat} | the qualifying win of {nation} over {nation2}
        {athlete} {person} retires | {athlete} {person} ended a career that brought {few} titles and {feat} at the {event} | the farewell of {athlete} {person}
        {person} leads {event} | {person} took the lead in the {event} with {feat} | the lead of {person} in the {event}
        {club} lose {athlete} to {injury} | {club} lost {athlete} {person} to a {injury} in training | the loss of {athlete} {person} at {club}
        {person} breaks {event} record | {national} {athlete} {person} set a record at the {event} | the record set by {person} at the {event}
        {event} draw pits {nation} against {nation2} | {nation} were drawn to meet {nation2} in the opening round of the {event} | the meeting of {nation} and {nation2} in the {event}
        {athlete} cleared of {offence} | {athlete} {person} was cleared of {offence} before the {event} | the hearing of {athlete} {person} over {offence}
        {club} name new {coach} | {club} appointed {person}, once a {athlete}, as their {coach} | the arrival of {person} as {coach} of {club}
        {nation} undone by {feat} | {feat} in the closing minutes cost {nation} their place in the {event} | the exit of {nation} from the {event}
        {person} back from {injury} | {athlete} {person} returned from a {injury} to play for {club} | the return of {athlete} {person}
        fans cheer as {club} end drought | {club} ended a drought of {period} without a trophy by beating {club2} | the trophy won by {club}
        {person} upset in {event} | top seed {person} crashed out of the {event}, undone by {feat} | the upset of {person} in the {event}
        {club} fined over {offence} | {club} were docked {few} points over {offence} | the points penalty handed to {club}
        {athlete} fit for {event} | {coach} {person} picked a {athlete} of 18 in the squad for the {event} | the choice of a teenage {athlete} for the {event}
        {athlete} wins on debut | {person}, a {national} {athlete}, delivered {feat} on debut for {club} | the debut of {athlete} {person}
        {club} stay unbeaten | {club} stretched their unbeaten run to {few} games with {feat} against {club2} | the unbeaten run of {club}
        rain stops {event} | rain halted play at the {event} with {person} one point from {feat} | the rain delay at the {event}
        {person} doubtful after {offence} row | {club} dropped {athlete} {person} after a row with the {coach} | the row between {athlete} {person} and the {coach}
        {club}, {club2} share spoils | {club} and {club2} drew after {feat} was cancelled out by {feat2} | the draw between {club} and {club2}
        {nation} name squad for {event} | {nation} left {athlete} {person} out of the squad for the {event} | the snub of {athlete} {person} by {nation}
        {athlete} chases {ordinal} title | {athlete} {person} moved within one win of a {ordinal} title at the {event} | the title chase of {athlete} {person}
    """),
    # Business
    _scenes("""
        {company} profit sags on {goods} | {company} posted a {percent} percent fall in quarterly profit as demand for {goods} weakened | the profit slump at {company}
        {company} plans {deal} | {company} announced a {deal} worth ${millions} million | the {deal} at {company}
        {asset} down after weak figures on {indicator} | {asset} fell after figures on {indicator} came in below forecasts | the weakness of {asset}
        {company} boss goes | the {executive} of {company} left after a {shake_up} angered investors | the departure of the {executive} of {company}
        {company} to buy {company2} | {company} agreed to buy {company2} for ${millions} million in cash and stock | the purchase of {company2} by {company}
        {watchdog} probes {company} | the {watchdog} opened an investigation of {company} for {misdeed} | the {misdeed} inquiry at {company}
        {goods} costlier as supply tightens | prices of {goods} climbed {percent} percent as stocks ran low | the price surge in {goods}
        {indicator} above forecasts in {nation} | {indicator} in {nation} rose {percent} percent, lifting {asset} | the rise of {indicator} in {nation}
        {company} settles {misdeed} case | {company} paid ${millions} million to settle claims of {misdeed} | the settlement by {company} over {misdeed}
        {company} unveils {shake_up} | {company} announced a {shake_up} to offset falling sales of {goods} | the {shake_up} at {company}
        {company} wins {goods} order | {company} won a ${millions} million order for {goods} from {company2} | the {goods} order won by {company}
        {executive} charged with {misdeed} | a former {executive} of {company} was charged with {misdeed} | the {misdeed} charges against a {executive}
        {watchdog} blocks {deal} | the {watchdog} blocked a {deal} between {company} and {company2} | the blocked {deal} of {company}
        {company} shares sink on {misdeed} | shares of {company} dropped {percent} percent on reports of {misdeed} | the slide in shares of {company}
        {company} seeks creditor shelter | {company}, a maker of {goods}, sought protection from its creditors | the insolvency of {company}
        {nation} raises duty on {goods} | {nation} imposed a {percent} percent import duty on {goods} | the import duty on {goods} in {nation}
        {asset} up on {goods} news | {asset} gained as traders bet on higher prices of {goods} | the rally of {asset}
        {company} workers strike over {shake_up} | workers at {company} walked out over a {shake_up} | the walkout at {company}
        {company} lifts outlook | {company} raised its earnings forecast on brisk sales of {goods} | the brighter forecast of {company}
        {executive} bets on {goods} | {person}, a {executive}, raised a stake in {company} to {percent} percent | the {percent} percent stake in {company}
        {nation} tightens lending | the central bank of {nation} tightened lending after figures on {indicator} unsettled {asset} | the lending curbs in {nation}
        {company}, {company2} in {deal} | {company} and {company2} formed a {deal} to sell {goods} in {nation} | the {deal} of {company} and {company2}
        {company} pulls out of {nation} | {company} sold its {goods} business in {nation} for ${millions} million | the exit of {company} from {nation}
        {company} debut lifts {asset} | {company} raised ${millions} million on its first day of trading on the {city} exchange | the stock market debut of {company}
        {goods} glut hits {company} | a glut of {goods} forced {company} to cut prices by {percent} percent | the glut of {goods}
        {company} sued over {misdeed} | shareholders sued {company} for {misdeed} in a {city} court | the shareholder suit against {company}
        budget shoppers turn to {goods} | households in {nation} spent more on {goods} even as {indicator} fell | the spending spree on {goods}
        {company} rejects {deal} | the board of {company} rejected a ${millions} million {deal} by {company2} | the rebuff of {company2} by {company}
    """),
    # Sci/Tech
    _scenes("""
        {scientist} see clue in {matter} | {scientist} in {city} found an unexpected trait in {matter} | the finding about {matter}
        new {gadget} shrinks to pocket size | engineers in {city} showed a {gadget} built with {matter} | the {gadget} built with {matter}
        {software} hit by {flaw} | a {flaw} spread through a widely used {software}, forcing users to download a fix | the {flaw} in a {software}
        {craft} to study {heavenly} | a {craft} was launched from {nation} to study {heavenly} | the launch of a {craft} to study {heavenly}
        {ailment} yields to {matter} | {scientist} slowed {ailment} in a laboratory trial using {matter} | the trial of a treatment for {ailment}
        {scientist} surprised by {organism} | {scientist} described the winter diet of {organism} | the study of {organism}
        free {software} gains users | a free {software} passed {millions} million downloads | the rise of a free {software}
        {scientist} decode {organism} | {scientist} decoded the genome of {organism} | the decoding of the genome of {organism}
        {heavenly} caught on camera | a {craft} sent back pictures of {heavenly} | the pictures of {heavenly}
        {gadget} gets smarter {software} | the new {gadget} runs a {software} on a chip the size of a fingernail | the new {gadget} with a {software}
        fossil link to {organism} found | {scientist} unearthed a fossil related to {organism} near {city} | the fossil found by {scientist}
        {flaw} puts {gadget} at risk | researchers warned that a {flaw} can take over a {gadget} | the {flaw} that attacks a {gadget}
        gene tied to {ailment} | a {lab} in {city} identified a gene tied to {ailment} | the gene tied to {ailment}
        {craft} falls silent | controllers lost contact with a {craft} on its way to {heavenly} | the loss of contact with a {craft}
        {matter} may power {gadget} | {scientist} used {matter} to run a {gadget} for {few} hours | the {gadget} powered by {matter}
        {organism} in decline | {scientist} counting {organism} in {nation} reported a steep decline | the decline of {organism} in {nation}
        {software} learns to spot {ailment} | a {software} trained on scans learned to detect {ailment} | the {software} that detects {ailment}
        {lab} opens {instrument} data | the {lab} in {city} put the data of its {instrument} online | the data of the {instrument}
        {scientist} rethink {heavenly} | new measurements led {scientist} to revise the age of {heavenly} | the revised age of {heavenly}
        test version of {software} out | programmers released a test version of a {software} for the {gadget} | the test version of a {software}
        warming shifts {organism} | rising temperatures drove {organism} toward the poles, {scientist} found | the migration of {organism}
        vaccine for {ailment} passes test | an experimental vaccine against {ailment} proved safe in {few} volunteers | the vaccine against {ailment}
        {matter} mapped in three dimensions | a {instrument} helped {scientist} map {matter} in three dimensions | the map of {matter}
        {gadget} makers agree on standard | engineers agreed on a common standard for the {gadget} and the {gadget2} | the common standard for the {gadget}
        patch for {software} closes {flaw} | developers of a {software} released a patch against a {flaw} | the patch against a {flaw}
        clue to {ailment} in {organism} | a compound found in {organism} eased {ailment} in tests at a {lab} | the compound found in {organism}
        {lab} builds {gadget} for {scientist} | a {lab} designed a {gadget} with which {scientist} track {organism} | the {gadget} for tracking {organism}
        {scientist} hear from {heavenly} | {scientist} recorded a faint signal from {heavenly} | the signal from {heavenly}
    """),
)
"""Events by label."""

FRAMES: Final = _scenes("""
    strong words from {actor} on {thing} | {actor} spoke out in {city} on {thing} | the remarks of {actor} on {thing}
    {actor} under fire over {thing} | {actor} came under fire over {thing} | the criticism of {actor} over {thing}
    second look at {thing} for {actor} | {actor} took a second look at {thing} | the second look of {actor} at {thing}
    {actor} in talks on {thing} | {actor} held talks in {city} about {thing} | the talks of {actor} about {thing}
    {actor} split over {thing} | {actor} and {actor2} were at odds over {thing} | the split between {actor} and {actor2}
    {actor} in alliance over {thing} | {actor} and {actor2} joined forces over {thing} | the alliance of {actor} and {actor2}
    questions for {actor} on {thing} | {actor} faced questions in {city} about {thing} and {thing2} | the questions to {actor} about {thing}
    {thing} at top of agenda | {actor} met {actor2} in {city} with {thing} at the top of the agenda | the meeting of {actor} and {actor2}
    silence from {actor} on {thing} | {actor} kept quiet about {thing} | the silence of {actor} about {thing}
    {actor} at odds with {actor2} | {actor} accused {actor2} of making too much of {thing} | the quarrel of {actor} and {actor2}
    {thing} back in spotlight | {thing} and {thing2} put {actor} in the spotlight | the attention that {thing} brought to {actor}
    {actor} to tell story of {thing} | {actor} agreed to tell the inside story of {thing} | the story of {thing} as told by {actor}
    doubts about {thing} from {actor} | {actor} voiced doubts about {thing} | the doubts of {actor} about {thing}
    {actor} in row over {thing} | {actor} became entangled in a row over {thing} | the row between {actor} and {actor2}
    {actor} wary of {thing} | {actor} urged caution over {thing} and {thing2} | the caution of {actor} over {thing}
    report on {thing} from {actor} | {actor} published a long report on {thing} | the report on {thing} by {actor}
    change of mind for {actor} on {thing} | {actor} had a change of mind about {thing} after {period} | the change of mind of {actor} about {thing}
    look back at {thing} | {actor} looked back on {thing} with {actor2} | the look back of {actor} on {thing}
    {actor} in search of answers on {thing} | {actor} pressed {actor2} for answers on {thing} | the answers that {actor} sought on {thing}
    {actor} to compare notes on {thing} | {actor} and {actor2} compared notes on {thing} | the exchange of {actor} and {actor2} on {thing}
    call from {actor} for debate on {thing} | {actor} called for an open debate on {thing} | the debate on {thing} called by {actor}
    warning from {actor} on {thing} | {actor} issued a warning about {thing} | the warning of {actor} about {thing}
    {actor} tired of {thing} | {actor} grew tired of talk of {thing} | the impatience of {actor} with {thing}
    {thing}: {actor} in new light | a film about {thing} showed {actor} in a new light | the film about {actor} and {thing}
""")
"""Events told alike on every topic: only `{actor}` and `{thing}`, drawn from the topic's own words, tell which it is."""

ACTORS: Final = (
    _lines("""
        the {national} {leader}
        {leader} {person}
        {group} in {nation}
        the {body} in {city}
        {victims} from {nation}
    """),
    _lines("""
        {club}
        {athlete} {person}
        the {national} {athlete}
        {person} of {club}
        the {coach} of {club}
    """),
    _lines("""
        {company}
        {executive} {person}
        the {executive} of {company}
        the {watchdog} in {city}
        {company}
    """),
    _lines("""
        {scientist} in {city}
        a team of {national} {scientist}
        the {lab} in {city}
        {scientist} led by {person}
        the {software} team in {city}
    """),
)
"""Who acts in a frame, by label."""

THINGS: Final = (
    _lines("""
        the {accord}
        the {attack}
        {grievance}
        {grievance}
        the {disaster}
        {charge}
        the plight of {victims}
    """),
    _lines("""
        the {event}
        the {event}
        {feat}
        {feat}
        the {injury}
        {offence}
    """),
    _lines("""
        the {deal}
        {goods}
        {goods}
        the {shake_up}
        {misdeed}
        {indicator}
        {asset}
    """),
    _lines("""
        {organism}
        {matter}
        the {gadget}
        the {software}
        the {flaw}
        {heavenly}
        the {craft}
        the {instrument}
        {ailment}
    """),
)
"""What a frame is about, by label."""

LINKS: Final = (
    # World
    _scenes("""
        {leader} faces vote in {nation} | the {national} {leader} lost a confidence vote for mishandling {other} | the confidence vote in {nation}
        riot police out in {city} | riot police in {city} broke up a crowd angered by {other} | the unrest in {city}
        {nation} lawmakers pass decree | lawmakers in {nation} passed an emergency decree in response to {other} | the emergency decree in {nation}
        {nation}, {nation2} trade accusations | {nation} summoned the ambassador of {nation2} to protest about {other} | the diplomatic protest by {nation}
        {body} to hear case | the {body} opened hearings on whether ministers knew of {other} | the hearings of the {body}
    """),
    # Sports
    _scenes("""
        {club} take field in armbands | {club} played on against {club2} with thoughts on {other}, and won | the victory of {club}
        {person} shrugs off distraction | {athlete} {person} shut out {other} to reach the final of the {event} | the final reached by {person}
        {event} goes ahead | organisers said the {event} would kick off on time in spite of {other} | the kick-off of the {event}
        {club} coach makes his point | the {coach} of {club} pinned a story about {other} to the locker room wall and saw his team win | the win of {club}
        {person} wins for home crowd | {person} dedicated a {event} title to those touched by {other} | the {event} title of {person}
    """),
    # Business
    _scenes("""
        {company} counts cost | {company} cut its earnings forecast by {percent} percent, citing {other} | the lowered forecast of {company}
        investors back {company} | shares of {company}, which earns its money from {other}, rose {percent} percent | the share gain of {company}
        {company} floats unit | {company} sold stock in a unit set up around {other} | the share sale by {company}
        insurers face bill | insurers including {company} put the cost of {other} at ${millions} million | the insurance bill of {company}
        {asset} in wild swings | {asset} swung in heavy trading as dealers weighed {other} | the heavy trading in {asset}
    """),
    # Sci/Tech
    _scenes("""
        {scientist} model it by computer | {scientist} in {city} wrote a computer simulation of {other} | the computer simulation from {city}
        {software} tracks chatter | a {software} that sifts millions of messages about {other} went online | the {software} that sifts messages
        {flaw} hides in news | a {flaw} disguised as e-mail about {other} infected computers | the {flaw} disguised as e-mail
        brain scans show memory at work | {scientist} scanned the brains of volunteers as they recalled {other} | the brain scans by {scientist}
        {gadget} shows its worth | inventors demonstrated a {gadget} by streaming pictures of {other} | the demonstration of the {gadget}
    """),
)
"""Events by label whose own words are few: what happens is of this topic, what it happens to is of another."""

REMARKS: Final = (
    _lines("""
        {person}, a former {leader} once accused of {charge}, looked on
        guests included the {national} {leader} and {few} {victims}
        it was, one witness said, as sudden as a {attack}
        a sermon on {grievance} had been heard there before
        the building once housed the {body}
        {person} recalled fleeing {group} as a child in {nation}
        the hall had sheltered {victims} after a {disaster}
    """),
    _lines("""
        {person}, a former {athlete} with {club}, looked on
        guests included the {coach} of {club} and a {national} {athlete}
        it was, one witness said, like {feat}
        the room was decorated with shirts from the {event}
        the venue was a {ground} better known for the {event}
        {person} recalled life as a {athlete} before a {injury}
        the crowd behaved as if it had seen {feat}
    """),
    _lines("""
        {person}, a former {executive} at {company}, looked on
        the evening was sponsored by {company}, a seller of {goods}
        it was, one witness said, like watching {asset} collapse
        guests included the {executive} of {company}
        the building once belonged to {company}
        {person} recalled selling {goods} and making a fortune in a {deal}
        brochures for {goods} lay on every seat
    """),
    _lines("""
        {person}, whose first job was with {scientist}, looked on
        the event was shown on a {gadget} running a {software}
        it was, one witness said, like seeing {heavenly}
        the venue was a {lab} known for research on {organism}
        the next room held a lecture on {matter}
        {person} recalled a childhood wish to join the {scientist}
        a {gadget} in the hall played a film about {organism}
    """),
)
"""Asides by label that only name a thing of that topic: a venue, a sponsor, a guest, a simile."""

DETAILS: Final = (
    _lines("""
        The {body} called for calm.
        Witnesses said {group} had been seen near {city}.
        The {national} {leader} condemned {grievance}.
        Tension over {grievance} has been growing for {period}.
        Diplomats in {city} hope for a {accord}.
        Many {victims} have left the area.
    """),
    _lines("""
        {person} also managed {feat}.
        The {coach} praised the {athlete} afterwards.
        Next comes the {event}.
        {club} are up next.
        A {injury} has kept the {athlete} out for {period}.
        It follows a season marked by {offence}.
    """),
    _lines("""
        The {executive} forecast weaker sales of {goods}.
        Figures for {indicator} are due on {day}.
        The {watchdog} declined to comment on the {deal}.
        Analysts had feared a {shake_up}.
        {asset} barely moved on the news.
        Competition in {goods} has grown for {period}.
    """),
    _lines("""
        The work could change how {scientist} think about {matter}.
        A {gadget} based on it may follow.
        Details appeared in a journal read by {scientist}.
        Similar results were seen in {organism}.
        The {lab} in {city} supplied the {instrument}.
        An update of the {software} is planned.
    """),
)
"""Further sentences by label."""

FRAMED_DETAILS: Final = _lines("""
    Attention now turns to {thing}.
    {actor} declined to comment.
    Talk of {thing} has been growing for {period}.
    {actor} could not be reached on {day}.
    There is also the matter of {thing}.
    For {actor} it is welcome news.
    Much depends on {actor} and on {thing}.
    In {city} it was compared to {thing}.
    {actor} took a different view of {thing}.
    Next on the list is {thing}.
""")
"""Further sentences told alike on every topic."""

NEUTRAL_DETAILS: Final = _lines("""
    It was the {ordinal} such report in {period}.
    {person}, reached in {city}, declined to comment.
    No further details were given on {day}.
    "We have waited {period} for this," said {person}.
    "Nobody saw it coming," said {person} in {city}.
    The news had been expected for {period}.
    {person} called it a turning point.
    A full statement is due in {city} on {day}.
    "This is only the beginning," {person} told reporters.
    Few had thought it possible {period} ago.
    People in {nation} took the news calmly.
    "There is still a long way to go," {person} said.
""")
"""Further sentences that are of no topic."""

NEUTRAL_HEADLINES: Final = _lines("""
    surprise in {city}
    {city} wakes to big news
    long wait ends in {nation}
    {person} has last word
    a {day} to remember in {city}
    hopes and doubts in {nation}
    {city} holds its breath
    {person} speaks out in {city}
    a first for {nation}
    all eyes on {city}
    {nation} takes stock
    setback for {person}
    {person} gets good news
    end of an era in {city}
    what comes next for {nation}
    {day} brings change in {city}
""")
"""Titles that give no topic away."""

TEASERS: Final = _lines("""
    amid {other}, {headline}
    forget {other}: {headline}
    after {other}, {headline}
    beyond {other}: {headline}
    {headline} despite {other}
    {headline}, {other} aside
""")
"""Titles in which the phrase of another topic stands beside the story's own headline."""

OPENINGS: Final = _lines("""
    While {aside_clause}, {main}.
    As {aside_clause}, {main}.
    A day after {aside_clause}, {main}.
    In a week that began with {aside_phrase}, {main}.
    Far from {aside_phrase}, {main}.
    With most eyes on {aside_phrase}, {main}.
""")
"""First sentences that begin with the aside."""

CLOSINGS: Final = _lines("""
    {main}, a day after {aside_clause}.
    {main}, while {aside_clause}.
    {main}, just as {aside_clause}.
    {main}, hours before {aside_clause}.
    {main}, in a week that began with {aside_phrase}.
    {main}, an event eclipsed by {aside_phrase}.
    {main}, with most eyes on {aside_phrase}.
""")
"""First sentences that end with the aside."""

AFTERTHOUGHTS: Final = _lines("""
    Meanwhile, {aside_clause}.
    The news came as {aside_clause}.
    It drew less notice than {aside_phrase}.
    "It makes people forget {aside_phrase}," said {person}.
    Until then the talk had been of {aside_phrase}.
    Newspapers had been full of {aside_phrase}.
    On the sidelines, {aside_remark}.
    At the announcement, {aside_remark}.
    Nearby, {aside_remark}.
""")
"""Sentences after the first that are all aside."""

MIXED_BODIES: Final = _lines("""
    {first_clause}. {second_clause}.
    {first_clause}, and {second_clause}.
    {first_clause}. Also on {day}, {second_clause}.
    Two stories shared the front page: {first_clause}, and {second_clause}.
    {first_clause}; {second_clause}.
    First, {first_clause}. Second, {second_clause}.
""")
"""Descriptions of a mixed story: two main clauses of equal standing, told in the order of the title."""

SOURCES: Final = ("", "", "Reuters - ", "AP - ", "AFP - ", "{city} (Reuters) - ", "{city} (AP) - ")
"""Agency marks before the description."""
