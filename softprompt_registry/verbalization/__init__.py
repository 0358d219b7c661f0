"""From a soft prompt to text: proposers write candidates, the best becomes the verbalization."""
