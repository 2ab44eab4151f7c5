"""Reports: tables, charts, Markdown and one self-contained HTML file."""
