"""What each command of the command line does, put together from the rooms."""
