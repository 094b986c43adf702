"""The ground floor: printing, options, artefacts, provenance and keyed randomness. Imports nothing from above."""
