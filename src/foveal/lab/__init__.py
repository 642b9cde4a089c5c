"""Commands and studies that use the core; nothing in the core imports them."""
