"""The winner at work: registered, judged at the gate, asked for predictions, exported."""
