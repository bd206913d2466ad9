// Before anything is drawn, so that a page in the other theme never flashes.
const theme = localStorage.getItem("tidegate.theme");
if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
