"""What a network delivered, for who pays for it: ``nearshard report``."""
