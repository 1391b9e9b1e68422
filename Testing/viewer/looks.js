// What a page looks like, measured in the browser: `contrasts`, `overlaps` and `unnamed` give lists of what is wrong.
(() => {
  const pixel = document.createElement("canvas").getContext("2d", { willReadFrequently: true });

  // [red, green, blue, alpha] in 0..1 of any CSS colour
  function parsed(color) {
    pixel.clearRect(0, 0, 1, 1);
    pixel.fillStyle = color;
    pixel.fillRect(0, 0, 1, 1);
    return [...pixel.getImageData(0, 0, 1, 1).data].map((value) => value / 255);
  }
  const over = (top, below, share = 1) => {
    const alpha = top[3] * share;
    return [0, 1, 2].map((n) => top[n] * alpha + below[n] * (1 - alpha)).concat(1);
  };
  function luminance(color) {
    const [r, g, b] = color.slice(0, 3).map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  }
  function ratio(a, b) {
    const [low, high] = [luminance(a), luminance(b)].sort((one, two) => one - two);
    return (high + 0.05) / (low + 0.05);
  }
  const chain = (node) => (node ? [...chain(node.parentElement), node] : []);
  const shareOf = (node) => chain(node).reduce((product, one) => product * Number(getComputedStyle(one).opacity), 1);

  // What can be behind an element: pictures of views may be black or white.
  function grounds(node) {
    const first = node.closest(".view") ? [[0, 0, 0, 1], [1, 1, 1, 1]] : [parsed(getComputedStyle(document.body).backgroundColor)];
    return first.map((base) => chain(node).reduce((color, one) => {
      const inView = one.classList.contains("view") || one.querySelector(":scope .image-display-area");
      return inView && node.closest(".view") ? color : over(parsed(getComputedStyle(one).backgroundColor), color, shareOf(one));
    }, base));
  }
  const worst = (color, node, share) => Math.min(...grounds(node).map((below) => ratio(over(parsed(color), below, share), below)));
  const visible = (node) => node.checkVisibility({ checkOpacity: true, checkVisibilityCSS: true })
    && node.getBoundingClientRect().width > 1 && node.getBoundingClientRect().height > 1;
  const disabled = (node) => node.closest(":disabled, [aria-disabled=true], .v-btn--disabled") !== null;
  const named = (node) => `${node.tagName.toLowerCase()}.${node.className?.baseVal ?? node.className} ${JSON.stringify(
    (node.getAttribute("aria-label") || node.innerText || node.value || "").slice(0, 40))}`;

  window.looks = {
    ratio: (a, b) => ratio(parsed(a), parsed(b)),

    // Text under 4.5 (3 where it is large), icons under 3; and how many of each were looked at.
    contrasts(root = document.body) {
      const wrong = [];
      let texts = 0, icons = 0;
      const walk = document.createTreeWalker(root, NodeFilter.SHOW_TEXT);
      const nodes = new Set([...root.querySelectorAll("input[type=text], input[type=number], select")]);
      while (walk.nextNode()) if (walk.currentNode.textContent.trim()) nodes.add(walk.currentNode.parentElement);
      for (const node of nodes) {
        if (!visible(node) || disabled(node) || node.matches("style, script, option")) continue;
        texts += 1;
        const style = getComputedStyle(node), size = parseFloat(style.fontSize);
        const least = size >= 24 || (size >= 18.66 && Number(style.fontWeight) >= 700) ? 3 : 4.5;
        const found = worst(style.color, node, shareOf(node));
        if (found < least) wrong.push(`${named(node)}: ${found.toFixed(2)} of ${least}`);
      }
      for (const node of root.querySelectorAll(".v-icon, svg.logo, .expert-dot, .view-dot, .engine")) {
        if (!visible(node) || disabled(node)) continue;
        icons += 1;
        const style = getComputedStyle(node, node.matches(".engine") ? "::before" : null);
        const colors = node.matches("[class*=dot], .engine") ? [style.backgroundColor, style.borderTopColor]
          : [node.matches("svg") ? style.stroke : style.color];
        const found = Math.max(...colors.map((color) => worst(color, node.parentElement, shareOf(node))));
        if (found < 3) wrong.push(`${named(node)}: ${found.toFixed(2)} of 3`);
      }
      return { wrong, texts, icons };
    },

    // The ring around what has the keyboard.
    focus() {
      const node = document.activeElement, area = node.matches(".remote-controlled-area");
      const style = area ? getComputedStyle(node.closest(".view"), "::after") : getComputedStyle(node);
      const [width, color] = area ? [style.borderTopWidth, style.borderTopColor] : [style.outlineWidth, style.outlineColor];
      const shown = parseFloat(width) >= 2 && (area || style.outlineStyle !== "none");
      // over a picture, the ring is told from the dark ring beside it
      const beside = node.closest(".view") ? style.boxShadow.match(/rgba?\([^)]*\)/)?.[0] : null;
      const contrast = beside ? ratio(parsed(color), parsed(beside)) : worst(color, node.parentElement, 1);
      const box = node.getBoundingClientRect();
      const part = ["header", "aside", "main", "footer"].findIndex((name) => node.closest(name));
      return { name: named(node), shown, contrast: node.closest(".view") && !beside ? 0 : contrast, part,
        inside: box.left >= 0 && box.top >= 0 && box.right <= innerWidth + 1 && box.bottom <= innerHeight + 1 };
    },

    // Controls and words that cover each other, are cut or out of sight, and bars that hide things.
    overlaps() {
      const wrong = [], whole = document.scrollingElement;
      if (whole.scrollWidth > innerWidth || whole.scrollHeight > innerHeight) wrong.push("the page is larger than the window");
      for (const node of document.querySelectorAll(".panel, .top, .status, .tools, .polarity, .row, .segments, .card")) {
        if (visible(node) && node.scrollWidth > node.clientWidth + 1) wrong.push(`${named(node)} is too wide`);
      }
      const panel = document.querySelector(".panel");
      if (panel.scrollHeight > panel.clientHeight + 1) wrong.push(`the panel hides ${panel.scrollHeight - panel.clientHeight} pixels`);
      const parts = [...document.querySelectorAll("button, input, select, summary, a[href], .view-head, .legends, .engine, .not-for-care, .badge")]
        .filter((node) => visible(node) && !node.matches(".skip"));
      const boxes = parts.map((node) => node.getBoundingClientRect());
      parts.forEach((node, n) => {
        const a = boxes[n];
        if (a.left < -1 || a.top < -1 || a.right > innerWidth + 1 || a.bottom > innerHeight + 1) wrong.push(`${named(node)} is out of sight`);
        if (node.matches("button") && [...node.querySelectorAll("span")].some((one) => one.scrollWidth > one.clientWidth + 1 && one.clientWidth)) {
          wrong.push(`${named(node)} is cut`);
        }
        parts.slice(n + 1).forEach((other, m) => {
          const b = boxes[n + 1 + m];
          const across = Math.min(a.right, b.right) - Math.max(a.left, b.left), down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
          if (across > 1 && down > 1 && !node.contains(other) && !other.contains(node)) wrong.push(`${named(node)} covers ${named(other)}`);
        });
      });
      return wrong;
    },

    // Controls that a screen reader could only call "button".
    unnamed: () => [...document.querySelectorAll("button, input, select, a[href], summary, [role=application], [tabindex='0']")]
      .filter((node) => node.checkVisibility() && !(node.getAttribute("aria-label") || node.innerText?.trim() || node.closest("label")?.innerText.trim()))
      .map(named),

    // What moves by itself or glides.
    moving: () => [...document.querySelectorAll("*")].filter((node) => {
      const style = getComputedStyle(node);
      return style.animationName !== "none" || style.transitionDuration.split(",").some((one) => parseFloat(one) > 0);
    }).map(named),
  };
})();
