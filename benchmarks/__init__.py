"""Studies on real models and real data. Each is resumable cell by cell; results are committed beside the code."""
