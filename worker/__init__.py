"""Train, pack and score one trial. Imports nothing of Caddie's other packages; see DESIGN.md for the import rule."""
