"""One tab: a scene, its views, and the page that shows them. A process of its own, started by `server`."""
