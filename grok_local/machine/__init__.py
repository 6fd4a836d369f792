"""What this machine is and how fast: facts, then what is read off the system, then what is measured."""
