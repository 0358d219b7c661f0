"""What the HTML pages share: the base template, its style, and how figures, numbers and texts stand in a page."""
