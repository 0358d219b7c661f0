"""What writes candidate texts for a soft prompt."""
