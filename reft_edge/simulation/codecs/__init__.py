"""What each codec costs and loses: one message of a really trained update, and a whole federation that uses it."""
