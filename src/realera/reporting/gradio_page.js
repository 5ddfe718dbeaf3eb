() => {
  document.documentElement.lang = "en";
  document.querySelector("#told")?.setAttribute("role", "status");
  document.addEventListener("click", event => {
    const button = event.target.closest("#models button.save");
    if (!button) return;
    const link = document.createElement("a");
    link.href = button.closest("figure").querySelector("img").src;
    link.download = button.dataset.name;
    link.click();
  });
}
