"""Views: order, policies, mixing, rendering and input."""
