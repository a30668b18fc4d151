"""The readers' study: can people tell generated volumes from real ones, and how do they rate them?

`medvolume reader-study create` writes one offline folder for each reader, `analyze` reads their answers, and `plan`
says how many readers and volumes are needed.

How it is built, and why:

- **One folder for each reader, opened from `file://`.** A page from a file cannot fetch files, so each volume is a
  script of its own that hands over its voxels as base64. The page's policy forbids any connection. Nothing is
  installed, and nothing leaves the machine until the reader sends the exported answers.
- **A plain canvas viewer, not NiiVue.** NiiVue's bundle weighs 2.3 MB and needs WebGL2, which remote desktops and old
  workstations in hospitals often lack, and it decides on interpolation and windows by itself. Three planes with
  scrolling, window and zoom are 250 lines, look the same on every machine, and log what a reader looked at.
- **Blinding.** Real and generated volumes take one path: read, brought to the same axes, voxel size and box, scaled by
  the same window, given the same faint noise, stored as uint8. Headers, sidecars and names are never copied. A file's
  name is a salted hash, its size is that of all others (voxels are not compressed: smooth volumes compress better), its
  date is a constant, and files are written in the order of their names. The salt and the truth are in `key.json`, which
  readers never get. Truth in a folder is that of the training cases alone, and only where their answers are shown.
- **Order.** Cases of each source are dealt into four quarters, which rotate from reader to reader; in a quarter the
  order is shuffled for each reader. The shuffles depend on the salt, so that the seed, which is 0 unless it is given,
  does not tell the order. So every case is read early by some and late by others, and no stretch holds real
  cases alone. Repeats, 10 to 20 % of the cases, are cases of the first half that come again in the second, with a new
  name and new noise. Forced choices between two volumes of one mask come last, so that they teach nothing before.
- **What is asked**: real or generated, confidence from 1 to 5, the three scales of Khader et al. 2023 (Medical
  Diffusion) to the letter, and a comment; see `reader_study.questions`.
- **What is recorded**: answers, the time in which the page was visible, visits, and the slices, windows and zooms.

Modules: `questions` (what is asked), `design` (which case when), `generated` (volumes for a study), `voxels`
(blinding), `kit` (folders), `answers` (reading them), `agreement`, `detection`, `readers_and_cases` (statistics),
`analysis`, `report`, `plan`.
"""
