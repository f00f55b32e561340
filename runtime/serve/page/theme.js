// Runs before anything is drawn, so that a chosen theme does not flash. Without a choice, the system's theme holds.
document.documentElement.dataset.theme = localStorage.getItem("theme") ?? "system";
