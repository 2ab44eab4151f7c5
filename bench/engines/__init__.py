"""Engines: everything that can serve a schedule, behind one small protocol (see ``base``)."""
