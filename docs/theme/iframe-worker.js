// Browsers start no worker from a file, and the search of the theme runs in one. On pages that are
// opened as files, a worker is therefore a hidden frame in which the same script runs.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.inside = new Promise(started => {
        const frame = document.createElement("iframe")
        frame.hidden = true
        frame.addEventListener("load", () => this.#start(frame.contentWindow, url, started), {
          once: true,
        })
        document.body.append(frame)
      })
    }

    #start(inside, url, started) {
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", { data }))
      const script = inside.document.createElement("script")
      script.addEventListener("load", () => started(inside))
      script.src = url
      inside.document.body.append(script)
    }

    postMessage(data) {
      this.inside.then(inside => inside.dispatchEvent(new MessageEvent("message", { data })))
    }
  }
}
