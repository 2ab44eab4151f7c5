"""When and how requests are sent: arrivals, schedules, and the driver that sends them and stamps the answers."""
