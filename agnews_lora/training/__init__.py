"""Training of trials behind one contract, blind to who asks for them and to who keeps the records."""
