(() => {
  const slider = document.getElementById('step');
  if (!slider) return;
  const now = document.getElementById('now'), play = document.getElementById('play');
  const films = [...document.querySelectorAll('.film')], said = [...document.querySelectorAll('.said li')];
  const show = (step) => {
    slider.value = step;
    now.textContent = step;
    for (const film of films) {
      const images = film.children, at = Math.min(step, images.length) - 1;
      for (let i = 0; i < images.length; i++) images[i].hidden = i !== at;
    }
    for (const line of said) {
      const on = line.dataset.step === String(step);
      line.classList.toggle('on', on);
      if (on) line.parentElement.scrollTop = line.offsetTop - line.parentElement.clientHeight / 2;
    }
  };
  let timer = null;
  const pause = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = 'Play';
    play.setAttribute('aria-pressed', 'false');
  };
  const start = () => {
    const last = Number(slider.max);
    timer = setInterval(() => show(Number(slider.value) % last + 1), last > 8 ? 200 : 700);
    play.textContent = 'Pause';
    play.setAttribute('aria-pressed', 'true');
  };
  slider.addEventListener('input', () => { pause(); show(Number(slider.value)); });
  play.addEventListener('click', () => timer === null ? start() : pause());
  show(1);
  if (matchMedia('(prefers-reduced-motion: reduce)').matches || Number(slider.max) < 2) pause(); else start();
})();
