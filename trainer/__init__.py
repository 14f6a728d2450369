"""What the student learns: replay of stored views and teacher logits, with no teacher in memory."""

# Sets TensorFlow's log level before any module here imports it.
import pipeline as pipeline
