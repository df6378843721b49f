"""What is wrong with a trained model, how sure that is, and what to do: checks, and the report that they make."""
