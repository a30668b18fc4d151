// Regions of a drawing, without the page: what `grow` and "Fill between slices" compute.

// The voxels that grow from one of them (Adams and Bischof 1994, with a fixed criterion): joined to it by faces, of the
// same code in the drawing, and of a value within `tolerance` of its own. Returns their positions.
export function connected(bytes, values, [x, y, z], from, tolerance) {
  const seen = new Uint8Array(bytes.length), found = [from], plane = x * y;
  const fits = (at) => bytes[at] === bytes[from] && Math.abs(values[at] - values[from]) <= tolerance;
  const visit = (at) => {
    if (seen[at] || !fits(at)) return;
    seen[at] = 1;
    found.push(at);
  };
  seen[from] = 1;
  for (let next = 0; next < found.length; next++) {
    const at = found[next], i = at % x, j = Math.floor(at / x) % y, k = Math.floor(at / plane);
    if (i > 0) visit(at - 1);
    if (i < x - 1) visit(at + 1);
    if (j > 0) visit(at - x);
    if (j < y - 1) visit(at + x);
    if (k > 0) visit(at - plane);
    if (k < z - 1) visit(at + plane);
  }
  return found;
}

// The signed distance of each voxel of a slice to the border of a label, in voxels, by two passes: positive inside.
export function signedDistance(slice, x, y, label) {
  const distance = (inside) => {
    const far = Float32Array.from(slice, (code) => ((code === label) === inside ? Infinity : 0));
    const near = (i, j, a, b, cost) => {
      if (i + a >= 0 && i + a < x && j + b >= 0 && j + b < y) {
        far[i + x * j] = Math.min(far[i + x * j], far[i + a + x * (j + b)] + cost);
      }
    };
    for (const way of [1, -1]) {
      for (let n = 0; n < x * y; n++) {
        const at = way > 0 ? n : x * y - 1 - n, i = at % x, j = Math.floor(at / x);
        for (const [a, b, cost] of [[-1, 0, 1], [0, -1, 1], [-1, -1, Math.SQRT2], [1, -1, Math.SQRT2]]) near(i, j, a * way, b * way, cost);
      }
    }
    return far;
  };
  const [within, outside] = [distance(true), distance(false)];
  return within.map((value, at) => (value > 0 ? Math.min(value, x + y) - 0.5 : 0.5 - Math.min(outside[at], x + y)));
}
