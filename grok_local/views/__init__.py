"""What people see, and what --json prints."""
