"use strict";
(() => {
  const list = document.getElementById("task-list");
  const [filter, category, sort, order] = ["filter", "category", "sort", "order"].map((id) => document.getElementById(id));
  const shown = document.getElementById("shown");
  const tasks = Array.from(list.children, (element) => ({
    element,
    text: element.textContent.toLowerCase(),
    keys: JSON.parse(element.dataset.keys),
  }));

  const arrange = () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const task of tasks) {
      const isWanted = words.every((word) => task.text.includes(word))
        && (!category || !category.value || task.element.dataset.category === category.value);
      task.element.hidden = !isWanted;
      count += isWanted;
    }
    let sorted = tasks;
    if (sort.value) {
      const sign = order.value === "lowest" ? 1 : -1;
      const key = (task) => task.keys[Number(sort.value)];
      // What has no value comes last, whichever way round.
      sorted = [...tasks].sort((a, b) => (key(a) === null) - (key(b) === null) || sign * (key(a) - key(b)));
    }
    list.append(...sorted.map((task) => task.element));
    order.disabled = !sort.value;
    shown.textContent = `${count} of ${tasks.length} tasks`;
  };

  for (const control of [filter, category, sort, order]) {
    control?.addEventListener("input", arrange);
  }
  document.getElementById("controls").hidden = false;
  arrange();
})();
