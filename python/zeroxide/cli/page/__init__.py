"""The page about a run: one HTML file with charts as SVG, made of the run's log and trace alone.

`log` and `timeline` read what the run has left -> `curves`, `memory` and `lanes` draw it, with `scale`, `thinning` and
`markup` -> `facts` and `tables` say it in words and numbers -> `document` puts it together, `style` colours it.
Nothing here needs the run's model, torch or a browser.
"""
