"""The report of a comparison: one HTML file of charts, tables and replayed views."""
