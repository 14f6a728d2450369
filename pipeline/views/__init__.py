"""Views: how they are drawn, rendered and mixed. A view is a function of (spec, view index) alone."""
