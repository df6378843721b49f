"""Tables, histories, numbers and given vectors to vectors; the search in long histories."""
