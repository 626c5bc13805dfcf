"""The notebooks: profiles, the strict papermill runner, the rendered pages."""
