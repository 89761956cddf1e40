"""Runs by the list: sampled, judged, timed, tabulated, drawn. The papers' tables, sweeps, demos and studies."""
