"""The studio: a page on which somebody who writes no Python paints a mask and sees a volume.

`medvolume studio --pipeline weights/hippocampus` serves it on this machine. How it is built, and why:

- **Starlette, uvicorn and one page of our own.** The page is three files without a build step. An app framework
  (Gradio, Solara, Panel) would stand between the pen and the server, and its widgets redraw when they like.
- **NiiVue comes from the wheel of ipyniivue**, which has it whole. `niivue.py` serves it from where pip put it. Nothing
  of it is copied into this repository, and nothing is fetched from a network.
- **Masks travel as bytes on our own grid.** The page gets a volume in RAS+ order on a straight grid, where NiiVue has
  nothing to permute or flip, and sends back the bytes of its drawing. `labels.py` turns them into label values, and the
  volumes' own writer puts them on the grid and in the orientation of the user's file.
- **One model in memory, one thread.** `worker.py` loads the model that a job names in place of another, and generates
  one volume after the other, by the steps of `medvolume generate` (`plan_volumes`, `prepare`, `generate`), so that a
  command or three lines of Python make the same voxels again. All else knows models by what `models.py` reads of them.
- **Sessions are apart.** Each browser has a folder of its own below a temporary one, which goes with the session, and
  all go with the server.

Modules: `niivue` (the viewer), `labels` (bytes of a drawing), `models` (what is known of a model, and which can share a
studio), `views` (volumes for the viewer), `uploads` (what users send), `session` (masks, images and results of one
browser), `inputs` (what the page asks for), `worker` (the queue), `again` (copy as Python, copy as command),
`downloads` (archives), `guard` (token and cookie), `routes` (what the page may ask), `app` (their addresses), `server`
(start and end).
"""
