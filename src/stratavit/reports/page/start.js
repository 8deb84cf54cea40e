startSummary();
startFacts();
startSizes();
startList();
show(within(0.5));
startCurve();
window.addEventListener("beforeprint", () => { at("curve-table").open = true; });
for (const gone of ["wheel", "touchmove"]) window.addEventListener(gone, hush, { passive: true });
