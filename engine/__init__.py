"""What any training stands on; knows neither images nor words."""
