"""What the teacher saw: seeded views of a data set and the teacher's logits for them, stored once."""

import logging
import os

# TensorFlow 2.15 logs three errors at every import ("Unable to register cuDNN factory ...") that mean
# nothing; what goes wrong reaches Python as an exception all the same. Read when TensorFlow is imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def _is_meant(record: logging.LogRecord) -> bool:
    """Drops the warning that Beam 2.77 gives at import where its optional BigQuery client is absent."""
    return not str(record.msg).startswith("apitools not found, and bigquery client libraries")


logging.getLogger().addFilter(_is_meant)
