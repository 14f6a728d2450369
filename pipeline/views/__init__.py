"""Views: order, policies, partners, mixing, rendering and input."""
