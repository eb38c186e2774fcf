"""What the commands on text share."""
