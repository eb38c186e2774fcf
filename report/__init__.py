"""What reproduce.py runs, measures, says and shows."""
