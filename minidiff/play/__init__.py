"""`minidiff play`: a local web page to draw pictures, and to try noise and schedules.

Read in this order:

    jobs        one job at a time, the visitors in turn; a job that is stopped stops its work
    offer       what the page offers: the systems and their options, and the checks of a request
    drawing     pictures step by step, the files of a finished run, and the command that makes the same ones
    attention   which pixels attend to which word
    noise       one image at every time, and the mean and standard deviation that q(x_t | x_0) predicts
    judging     schedules as tables, a curve drawn by hand as a schedule, and the laws one by one
    guard       who may ask: Host, Origin, the size of a request; the headers that bind the browser
    app         the routes
    server      the sockets and the time limits of a connection

The page itself is in static/: plain HTML, CSS and JavaScript, which ask nothing of any other machine.  A request that
computes is answered by JSON lines, one for each event, as they happen (app.py lists them).
"""
