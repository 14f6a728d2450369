"""What the student learns: replay of stored views and teacher logits, with no teacher in memory."""
