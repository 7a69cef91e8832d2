"""What a trial trains: its specification, its exact cost, its files, and the base model that it adapts."""
