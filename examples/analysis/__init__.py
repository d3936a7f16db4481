"""Where two models differ on the same items, and a page that shows it."""
