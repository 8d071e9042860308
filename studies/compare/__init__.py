"""Other density models from their own libraries on the same data, and the report that puts them beside ours."""
