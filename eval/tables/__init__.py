"""The papers' tables, results as JSON, rendering and plots."""
