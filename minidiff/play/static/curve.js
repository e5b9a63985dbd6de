// A monotone cubic through points, as SciPy's PchipInterpolator computes it: it falls where the points fall.

export function pchip(xs, ys) {
  const n = xs.length, h = [], m = [];
  for (let i = 0; i < n - 1; i++) {
    h.push(xs[i + 1] - xs[i]);
    m.push((ys[i + 1] - ys[i]) / h[i]);
  }
  const d = new Array(n).fill(0);
  if (n === 2) d.fill(m[0]);
  else {
    for (let i = 1; i < n - 1; i++) {
      if (m[i - 1] * m[i] > 0) {                            // a weighted harmonic mean of the two slopes
        const w1 = 2 * h[i] + h[i - 1], w2 = h[i] + 2 * h[i - 1];
        d[i] = (w1 + w2) / (w1 / m[i - 1] + w2 / m[i]);
      }
    }
    d[0] = end(h[0], h[1], m[0], m[1]);
    d[n - 1] = end(h[n - 2], h[n - 3], m[n - 2], m[n - 3]);
  }
  return (x) => {
    let i = 0;
    while (i < n - 2 && x > xs[i + 1]) i++;
    const s = (x - xs[i]) / h[i], r = 1 - s;
    return ys[i] * (1 + 2 * s) * r * r + h[i] * d[i] * s * r * r + ys[i + 1] * s * s * (3 - 2 * s) - h[i] * d[i + 1] * s * s * r;
  };
}

// The slope at an end, of the parabola through three points, limited so that the curve stays monotone.
function end(h0, h1, m0, m1) {
  const slope = ((2 * h0 + h1) * m0 - h0 * m1) / (h0 + h1);
  if (Math.sign(slope) !== Math.sign(m0)) return 0;
  if (Math.sign(m0) !== Math.sign(m1) && Math.abs(slope) > 3 * Math.abs(m0)) return 3 * m0;
  return slope;
}
