"""What the teacher saw: seeded views of a data set and the teacher's logits for them, stored once."""
