"""What the bench measures, one file a subject."""
