"""Making a teacher: pretrained weights and fine-tuning."""
