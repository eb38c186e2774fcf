"""What the commands on images share."""
